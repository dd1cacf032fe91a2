-- How a circuit stands. A forced state that is over ends here, where somebody looks.
-- KEYS[1] the partition.
-- ARGV: now us, name.
-- RETURNS {state and numbers, who, why}.
local before = load_circuit(call('GET', base .. 'circuit:' .. ARGV[2]))
local after = current(before)
if after ~= before then save_circuit(ARGV[2], before, after) end
return {circuit_view(after)}
