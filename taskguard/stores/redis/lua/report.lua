-- Count calls, and how a probe ended, in the circuit of the fleet.
-- KEYS[1] the partition.
-- ARGV: now us, name, generation, calls, failures, slow, the probe's holder, its outcome or empty, the terms of a
--   breaker, one text.
-- RETURNS {state and numbers, who, why}: the circuit after that.
local before = load_circuit(call('GET', base .. 'circuit:' .. ARGV[2]))
local told = {generation = tonumber(ARGV[3]), calls = tonumber(ARGV[4]), failures = tonumber(ARGV[5]),
  slow = tonumber(ARGV[6])}
local after = report(breaker_terms(ARGV[9]), before, told, {holder = ARGV[7], outcome = ARGV[8]})
if after ~= before then save_circuit(ARGV[2], before, after) end
return {circuit_view(after)}
