-- The circuit, as `breaker.py` has it: same names, same operations; `ends` is its `until`. What was loaded is never changed
-- in place. It rests as its view, with the instants from and until which that holds, and then everything as a
-- MessagePack map, which keeps doubles exactly. The line before the first newline is "from until, bytes of who, bytes of
-- why, state and numbers"; then who, why and the map follow.
local FORCED = {forced_open = true, forced_closed = true, disabled = true}
local BUCKETS, REMEMBERED, AHEAD, EPOCH, PAUSED, LATE = 10, 86400e6, 1e6, 1735689600e6, 'retry-after', 10

local function load_circuit(kept)
  if kept then
    local who, why, text = string.match(kept, '^%S+ %S+ (%d+) (%d+) [^\n]*\n()')
    return cmsgpack.unpack(string.sub(kept, text + who + why))
  end
  return {state = 'closed', generation = 0, ends = 0, trips = 0, closed_at = 0, successes = 0, probes = {}, span = 0,
    window = {}, who = '', why = '', kept = 0}
end

local function replaced(circuit, fields)
  for field, value in pairs(circuit) do
    if fields[field] == nil then fields[field] = value end
  end
  return fields
end

local function following(circuit, state, fields)
  fields.state, fields.generation, fields.successes = state, circuit.generation + 1, 0
  fields.probes, fields.window, fields.who, fields.why = {}, {}, fields.who or '', fields.why or ''
  fields.ends, fields.trips, fields.kept = fields.ends or 0, fields.trips or 0, 0
  return replaced(circuit, fields)
end

local function is_paused(circuit) return circuit.state == 'forced_open' and circuit.who == PAUSED end

local function going_on(circuit, state, fields)
  fields.state, fields.generation, fields.kept = state, circuit.generation + 1, (circuit.kept or 0) + 1
  fields.ends, fields.who, fields.why = fields.ends or 0, fields.who or '', fields.why or ''
  return replaced(circuit, fields)
end

local function current(circuit)
  if not FORCED[circuit.state] or circuit.ends == 0 or circuit.ends > now then return circuit end
  local closed_at = circuit.state == 'forced_open' and circuit.ends or circuit.closed_at
  local follows = is_paused(circuit) and going_on or following
  return follows(circuit, 'closed', {closed_at = closed_at, why = circuit.state .. ' is over'})
end

local function breaker_terms(text)
  local terms, told = {}, numbers(text)
  for i, field in ipairs({'failure_rate', 'slow_rate', 'minimum_calls', 'counted', 'window', 'wait', 'backoff', 'max_wait',
    'probes', 'successes', 'probe_lease'}) do terms[field] = told[i] end
  return terms
end

-- The wait (0 lets the call through, nil: no waiting helps), the changed circuit if any, whether it is a probe. A closed
-- circuit needs no terms, so they are read behind that.
local function ask_circuit(circuit, holder, told)
  circuit = current(circuit)
  if circuit.state == 'closed' or circuit.state == 'forced_closed' or circuit.state == 'disabled' then return 0 end
  local terms = breaker_terms(told)
  if circuit.state == 'open' and circuit.ends - now > terms.max_wait + AHEAD then
    return terms.max_wait, replaced(circuit, {ends = now + terms.max_wait})
  end
  if circuit.state ~= 'half_open' and circuit.ends > now then return circuit.ends - now end
  if circuit.state == 'forced_open' then return nil end
  if circuit.state == 'open' then
    circuit = following(circuit, 'half_open', {trips = circuit.trips, why = 'the first probe goes'})
  end
  local probes, count, soonest = {}, 0, nil
  for name, lease in pairs(circuit.probes) do
    if lease > now - LATE * terms.probe_lease then probes[name] = lease end
    if lease > now then count, soonest = count + 1, min(soonest or lease, lease) end
  end
  if (probes[holder] or 0) <= now and count >= terms.probes then return soonest - now end
  probes[holder] = max(probes[holder] or 0, now + terms.probe_lease)
  return 0, replaced(circuit, {probes = probes}), true
end

-- The parts that count now, and the sums of their calls, failures and slow ones.
local function within(window, span)
  local parts, calls, failures, slow = {}, 0, 0, 0
  for _, part in ipairs(window) do
    if span == 0 or now - span < part[1] and part[1] <= now + AHEAD then
      parts[#parts + 1] = part
      calls, failures, slow = calls + part[2], failures + part[3], slow + part[4]
    end
  end
  return parts, calls, failures, slow
end

-- A circuit for those who look: state and numbers, then who and why.
local function circuit_view(circuit)
  circuit = current(circuit)
  local _, calls, failures, slow = within(circuit.window, circuit.span)
  return format('%s %.0f %.0f %.0f %.0f %.0f %.0f %.0f', circuit.state, circuit.generation, circuit.ends, calls, failures,
    slow, circuit.trips, circuit.closed_at), circuit.who, circuit.why
end

-- Write what was made of a circuit, and tell who watches where it is another generation.
local function save_circuit(id, before, after)
  local key, index, lasts = base .. 'circuit:' .. id, base .. 'circuits', nil
  local line, who, why = circuit_view(after)
  local newest, oldest = 0, 1e300
  for _, part in ipairs(after.window) do
    newest, oldest = max(newest, part[1]), after.span ~= 0 and min(oldest, part[1] + after.span) or oldest
  end
  local head = format('%.17g %.17g %d %d %s\n', newest, oldest, #who, #why, line)
  call('SET', key, head .. who .. why .. cmsgpack.pack(after))
  if not FORCED[after.state] or after.ends ~= 0 then
    lasts = max(now, after.ends)
    for _, lease in pairs(after.probes) do lasts = max(lasts, lease) end
    lasts = lasts + max(REMEMBERED, after.span)
    call('PEXPIRE', key, ttl(lasts))
  end
  call('ZADD', index, lasts and format('%.17g', lasts) or 'inf', id)
  local last = call('ZRANGE', index, -1, -1, 'WITHSCORES')[2]
  if last == 'inf' then call('PERSIST', index) else call('PEXPIRE', index, ttl(tonumber(last))) end
  if after.generation ~= before.generation then
    redis.pcall('PUBLISH', base .. 'changes', cjson.encode({id, line, who, why}))  -- a user may lack the channel
  end
end
