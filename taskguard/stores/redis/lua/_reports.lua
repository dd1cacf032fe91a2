-- What outcomes and probes make of a circuit, as `breaker.report` has it.
local function opened(terms, circuit, why)
  local wait = terms.wait
  for _ = 1, circuit.trips do
    if wait >= terms.max_wait then break end
    wait = wait * terms.backoff
  end
  wait = max(wait, circuit.ends - now)
  local ends = now + ceil(min(wait, terms.max_wait))
  return following(circuit, 'open', {ends = ends, trips = circuit.trips + 1, why = why})
end

local function probed(terms, circuit, holder, outcome)
  if not circuit.probes[holder] then return circuit end
  if outcome == 'failure' then return opened(terms, circuit, 'a probe failed') end
  local succeeded = outcome == 'success' and 1 or 0
  if succeeded == 1 and circuit.successes + 1 >= terms.successes then
    return following(circuit, 'closed', {closed_at = now, why = 'the probes succeeded'})
  end
  local probes = {}
  for name, lease in pairs(circuit.probes) do
    if name ~= holder then probes[name] = lease end
  end
  return replaced(circuit, {probes = probes, successes = circuit.successes + succeeded})
end

local function counted(terms, circuit, calls, failures, slow)
  local window, part = {}, max(floor(terms.window / BUCKETS), 1)
  for i, each in ipairs(circuit.window) do window[i] = each end
  local last, by_calls = window[#window], terms.counted == 1
  local span, began = by_calls and 0 or terms.window, by_calls and now or now - fmod(now + EPOCH, part)
  local joins
  if by_calls then joins = last and last[2] + calls <= floor(terms.window / BUCKETS) else joins = last and last[1] >= began end
  if joins then
    window[#window] = {last[1], last[2] + calls, last[3] + failures, last[4] + slow}
  else
    window[#window + 1] = {began, calls, failures, slow}
  end
  if by_calls then
    local total = 0
    for _, each in ipairs(window) do total = total + each[2] end
    while total - window[1][2] >= terms.window do total = total - table.remove(window, 1)[2] end
  else
    window = within(window, span)
  end
  return replaced(circuit, {span = span, window = window})
end

local function report(terms, circuit, told, probe)
  circuit = current(circuit)
  local before = circuit.generation - told.generation
  if before < 0 or before > (circuit.kept or 0) then return circuit end
  if circuit.state == 'half_open' and probe.outcome ~= '' then
    return probed(terms, circuit, probe.holder, probe.outcome)
  end
  if not (circuit.state == 'closed' or is_paused(circuit)) or told.calls <= 0 then return circuit end
  circuit = counted(terms, circuit, told.calls, told.failures, told.slow)
  local _, calls, failures, slow = within(circuit.window, circuit.span)
  if calls < terms.minimum_calls then return circuit end
  if failures / calls >= terms.failure_rate then
    return opened(terms, circuit, format('%.0f of %.0f calls failed', failures, calls))
  end
  if slow / calls >= terms.slow_rate then
    return opened(terms, circuit, format('%.0f of %.0f calls were slow', slow, calls))
  end
  return circuit
end
