-- Decide all that one call needs, in one step: slots given back, then circuit, rates and slot, all of it or nothing.
-- KEYS[1] the partition.
-- ARGV: now us, holder of the slot, holder of the probe, book and booked as 0/1 each; of a lone bucket need, most, full us
--   as `_usual.lua` reads them, else three empty; of the slot limit, 0 for none, name, lease us; of the circuit name,
--   terms of a breaker, empty for none; number of rates, of each: name, text of (kind, adaptive 0/1, cost, limit,
--   period us, burst, most); then of each slot given back: name, holder.
-- RETURNS {0, probe 0/1, version, rates, circuit} or {1, by, name, wait us or -1, us to the slot booked or -1, version,
--   rates, circuit}, where rates are (permits left, us until all are back[, limit if it adapts]), none where a circuit
--   refused, and circuit is (state and numbers, who, why), nothing where it is as new; or as `_usual.lua` says.
local rates, keys, slot, circuit, after, probe = {}, {KEYS[1] .. ':rules:version'}, nil, nil, nil, nil
for n = 1, ARGV[13] do
  local rate = rate_of(ARGV[12 + 2 * n], ARGV[13 + 2 * n])
  rates[n] = rate
  keys[#keys + 1], keys[#keys + 2] = rate.key, rate.line
  if rate.adaptive then keys[#keys + 1] = base .. 'adaptive:' .. rate.name end
end
for i = 14 + 2 * ARGV[13], #ARGV, 2 do give_back(bulkhead(ARGV[i]), ARGV[i + 1]) end
if ARGV[8] ~= '0' then
  slot = {name = ARGV[9], holder = ARGV[2], limit = tonumber(ARGV[8]), lease = tonumber(ARGV[10])}
  keys[#keys + 1] = base .. 'queue:' .. slot.name
end
local guarded = ARGV[12] ~= '' and ARGV[11]
if guarded then keys[#keys + 1] = base .. 'circuit:' .. guarded end
load(keys)
local version = stored[keys[1]] or 0

if guarded then
  circuit = load_circuit(stored[base .. 'circuit:' .. guarded])
  local wait
  wait, after, probe = ask_circuit(circuit, ARGV[3], ARGV[12])
  if wait ~= 0 then
    if after then save_circuit(guarded, circuit, after) end
    local reply = {1, 'circuit', guarded, wait and ceil(wait) or -1, -1, version}
    append_circuit(reply, after or circuit)
    return reply
  end
end
return decide(rates, slot, {name = guarded, was = circuit, after = after, probe = probe}, version)
