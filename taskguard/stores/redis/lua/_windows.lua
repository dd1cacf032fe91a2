-- The windows and the log, as `limits.py` has them. A window's state is {start, used[, before]}. A log rests as a list:
-- what its entries cost together, then the entries, oldest first; its state here is what a decision makes of that:
-- {total, gone = entries that are over, added = entries to come, mended = whether all become one}.
local SINCE_1970 = 1735689600e6

local function window_at(terms, state)
  local start = state and state[1] or now
  local mended = start - now > SKEW
  local time = mended and now or max(start, now)
  return start, time, time - fmod(time + SINCE_1970, terms.period), mended
end

local function fixed_at(terms, state)
  local start, _, current, mended = window_at(terms, state)
  return current, state and start >= current and state[2] or 0, mended
end

KINDS.fixed = {
  decide = function(terms, state, cost)
    local start, used, mended = fixed_at(terms, state)
    local finish = start + terms.period
    if used + cost <= max(terms.limit, cost) then return 0, {start, used + cost}, finish end
    return finish - now, mended and {start, used}, finish
  end,
  room = function(terms, state)
    local start, used = fixed_at(terms, state)
    return terms.limit - used, used ~= 0 and start + terms.period - now or 0
  end,
  keep = keep,
}

local function sliding_at(terms, state)
  local start, time, current, mended = window_at(terms, state)
  local used, before = state and state[2] or 0, state and state[3] or 0
  if start >= current then return time, current, used, before, mended end
  return time, current, 0, current - start <= terms.period and used or 0, mended
end

KINDS.sliding = {
  decide = function(terms, state, cost)
    local time, start, used, before, mended = sliding_at(terms, state)
    local left, period, most = start + terms.period - time, terms.period, max(terms.limit, cost)
    local finish, wait = start + period * 2
    if before * (left / period) + used + cost <= most then return 0, {start, used + cost, before}, finish end
    if used + cost <= most then
      wait = exactly(left - (most - cost - used) * period / before, function(later)
        return before * ((left - later) / period) + used + cost <= most
      end)
    else
      wait = exactly(left + period - (most - cost) * period / used, function(later)
        return used * ((left + period - later) / period) + cost <= most
      end)
    end
    return wait + (time - now), mended and {start, used, before}, finish
  end,
  room = function(terms, state)
    local time, start, used, before = sliding_at(terms, state)
    local left = terms.limit - used - before * ((start + terms.period - time) / terms.period)
    return left, (used ~= 0 or before ~= 0) and start + terms.period * (used ~= 0 and 2 or 1) - now or 0
  end,
  keep = keep,
}

local function entry(line)
  local at, cost = string.match(line, '^(%S+) (%S+)$')
  return {tonumber(at), tonumber(cost)}
end

-- A function that gives the i-th entry of a log, from 1, read a page at a time: a decision looks at few of them.
local function reader(key)
  local page, first = {}, 1
  return function(i)
    if i < first or i >= first + #page then page, first = call('LRANGE', key, i, i + 31), i end
    return entry(page[i - first + 1])
  end
end

local function log_of(key)
  local count = call('LLEN', key) - 1
  if count < 1 then return nil end
  return {tonumber(call('LINDEX', key, 0)), gone = 0, added = {}, count = count, read = reader(key)}
end

local function entry_at(state, i)
  if state.mended then return i == 1 and state.mended or state.added[i - 1] end
  return i <= state.count and state.read(i) or state.added[i - state.count]
end

local function last_of(state) return (state.mended and 1 or state.count) + #state.added end

-- The instant that counts as now, the state without what is over, whether it has to be mended.
local function log_at(terms, state)
  if not state or state.gone == last_of(state) then
    return now, {0, gone = state and state.count or 0, added = {}, count = state and state.count or 0}, false
  end
  local last, total, gone = last_of(state), state[1], state.gone
  local newest = entry_at(state, last)[1]
  if newest - now > SKEW then return now, {total, gone = 0, added = {}, mended = {now, total}, count = state.count}, true end
  local time = max(newest, now)
  while gone < last do
    local each = entry_at(state, gone + 1)
    if each[1] > time - terms.period then break end
    total, gone = total - each[2], gone + 1
  end
  return time, {gone < last and total or 0, gone = gone, added = state.added, mended = state.mended,
    count = state.count, read = state.read}, false
end

KINDS.log = {
  decide = function(terms, state, cost)
    local time, after, mended = log_at(terms, state)
    local most, last = max(terms.limit, cost), last_of(after)
    if after[1] + cost <= most then
      after[1], after.added = after[1] + cost, {unpack(after.added)}
      after.added[#after.added + 1] = {time, cost}
      return 0, after, time + terms.period
    end
    local left = after[1]
    for i = after.gone + 1, last do
      local each = entry_at(after, i)
      left = i == last and 0 or left - each[2]
      if left + cost <= most then return each[1] + terms.period - now, mended and after, time + terms.period end
    end
  end,
  room = function(terms, state)
    local _, after = log_at(terms, state)
    local last = last_of(after)
    return terms.limit - after[1], after.gone < last and entry_at(after, last)[1] + terms.period - now or 0
  end,
  keep = function(key, state, until_us)
    local total = format('%.17g', state[1])
    if state.mended or state.gone >= state.count then
      call('DEL', key)
      call('RPUSH', key, total)
    else
      if state.gone > 0 then call('LTRIM', key, state.gone, -1) end
      call('LSET', key, 0, total)
    end
    if state.mended then call('RPUSH', key, format('%.17g %.17g', state.mended[1], state.mended[2])) end
    local dropped = max(state.gone - (state.mended and 1 or state.count), 0)
    for i = dropped + 1, #state.added do
      call('RPUSH', key, format('%.17g %.17g', state.added[i][1], state.added[i][2]))
    end
    call('PEXPIRE', key, ttl(until_us))
  end,
}
