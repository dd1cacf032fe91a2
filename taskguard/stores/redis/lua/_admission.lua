-- One call's admission, as `admission.py` has it. States are looked up in what this call takes, in what it changes even
-- if it is refused, and in what is stored; a change is {state, until, function that writes it}.
local stored, loaded, kept, taken = {}, {}, {}, {}

local function load(keys)
  local found = call('MGET', unpack(keys))
  for i, key in ipairs(keys) do stored[key] = found[i] end
end

local function state_of(key, kind, with_taken)
  local change = with_taken and taken[key] or kept[key]
  if change then return change[1] end
  if loaded[key] == nil then loaded[key] = kind == 'log' and log_of(key) or numbers(stored[key]) or false end
  return loaded[key] or nil
end

local function write(changes)
  for key, change in pairs(changes) do change[3](key, change[1], change[2]) end
end

local function rate_of(id, told)
  local kind, adaptive, cost, terms = string.match(told, '^(%S+) (%d) (%S+) (.*)$')
  local rate = {name = id, kind = kind, cost = tonumber(cost), adaptive = adaptive == '1'}
  rate.key, rate.line = base .. kind .. ':' .. id, base .. 'line:' .. id
  rate.terms = terms_of(kind, unpack(numbers(terms)))
  return rate
end

local function try_rate(rate, booked, refused)
  local kind, terms, wait, state, lasts = KINDS[rate.kind], rate.terms, nil, nil, nil
  local limit = rate.adaptive and stored[base .. 'adaptive:' .. rate.name]
  if limit then
    terms = adapted(terms, tonumber(limit))
    rate.terms = terms
  end
  if rate.cost <= terms.most then
    wait, state, lasts = kind.decide(terms, state_of(rate.key, rate.kind, true), rate.cost)
  end
  local alone, spacing = wait, rate.cost * terms.interval
  local stands = booked and 0 or stands_until(state_of(rate.line))
  if wait and stands ~= 0 then wait = max(wait, ceil(stands + spacing - now)) end
  if wait == 0 then
    taken[rate.key] = {state, lasts, kind.keep}
    return
  end
  if alone ~= 0 and state and not taken[rate.key] then kept[rate.key] = {state, lasts, kind.keep} end
  refused[#refused + 1] =
    {by = 'rate', name = rate.name, wait = wait, soonest = alone or 0, line = rate.line, spacing = spacing}
end

local function book_all(refused, booked)
  local found, latest = {}, 0
  for i, each in ipairs(refused) do
    if not each.wait then return nil end
    local slot, line = book(state_of(each.line), each.soonest, each.spacing, booked)
    found[i], latest = {slot, line}, max(latest, slot)
  end
  for i, each in ipairs(refused) do
    local slot, line = found[i][1], found[i][2]
    if slot >= latest or slot + each.spacing >= latest then
      if slot < latest then line = moved(state_of(each.line), latest, booked) end
      kept[each.line] = {line, nil, keep_line}
    end
  end
  return latest
end

-- What is left of each rate, behind what the reply has already: permits, microseconds, and the limit if it adapts.
local function append_rates(reply, rates, with_taken)
  for _, rate in ipairs(rates) do
    local left, reset = KINDS[rate.kind].room(rate.terms, state_of(rate.key, rate.kind, with_taken))
    reply[#reply + 1], reply[#reply + 2] = max(floor(left + 1e-6), 0), ceil(reset)
    if rate.adaptive then reply[#reply + 1] = format('%.17g', rate.terms.limit) end
  end
end

local function append_circuit(reply, circuit)
  if circuit and circuit.generation + #circuit.window > 0 then
    reply[#reply + 1], reply[#reply + 2], reply[#reply + 3] = circuit_view(circuit)
  end
end

-- Rates and slot of a call that its circuit lets through: the reply of `admit.lua`.
local function decide(rates, slot, circuit, version)
  local booked, refused = ARGV[4] == '01' or ARGV[4] == '11', {}
  for _, rate in ipairs(rates) do try_rate(rate, booked, refused) end
  if slot then
    slot.house = bulkhead(slot.name)
    local wait = place(slot.house, slot.holder, slot.limit)
    if wait > 0 then
      refused[#refused + 1] = {by = 'slot', name = slot.name, wait = wait, soonest = wait,
        line = base .. 'queue:' .. slot.name, spacing = spacing_of(slot.house, slot.limit)}
    end
  end
  if not refused[1] then
    local reply = {0, circuit.probe and 1 or 0, version}
    append_rates(reply, rates, true)
    append_circuit(reply, circuit.after or circuit.was)
    if slot then take(slot.house, slot.holder, slot.lease) end
    if circuit.after then save_circuit(circuit.name, circuit.was, circuit.after) end
    write(kept)
    write(taken)
    return reply
  end
  local booking = string.sub(ARGV[4], 1, 1) == '1' and book_all(refused, booked)
  local worst = refused[1]
  for _, each in ipairs(refused) do
    if (each.wait or math.huge) > (worst.wait or math.huge) then worst = each end
  end
  local wait = worst.wait and ceil(worst.wait) or -1
  local reply = {1, worst.by, worst.name, wait, booking and ceil(booking - now) or -1, version}
  append_rates(reply, rates, false)
  append_circuit(reply, circuit.was)
  write(kept)
  return reply
end
