-- An operator's word: a state until an instant, or "closed" to begin anew. A pause yields to every other state.
-- KEYS[1] the partition.
-- ARGV: now us, name, state, until us (0: for good), who, why.
-- RETURNS {state and numbers, who, why}.
local before = load_circuit(call('GET', base .. 'circuit:' .. ARGV[2]))
local circuit = current(before)
if ARGV[3] == 'forced_open' and ARGV[5] == PAUSED and tonumber(ARGV[4]) ~= 0 then
  local after, ends = circuit, tonumber(ARGV[4])
  if circuit.state == 'closed' or is_paused(circuit) and circuit.ends < ends then
    after = going_on(circuit, 'forced_open', {ends = ends, who = PAUSED, why = ARGV[6]})
  end
  if after ~= before then save_circuit(ARGV[2], before, after) end
  return {circuit_view(after)}
end
local closed_at = ARGV[3] == 'closed' and circuit.state ~= 'closed' and now or circuit.closed_at
local after = following(circuit, ARGV[3], {ends = tonumber(ARGV[4]), who = ARGV[5], why = ARGV[6], closed_at = closed_at})
save_circuit(ARGV[2], before, after)
return {circuit_view(after)}
