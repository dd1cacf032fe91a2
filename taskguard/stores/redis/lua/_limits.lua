-- The rates, as `limits.py` has them: same names, same operations in the same order. Here the bucket; `_windows.lua` has
-- the others, for the asks that need them.
--
-- A kind has `decide(terms, state, cost)`: the wait (0 admits, nil never will), the state to write if any, and until
-- when that says something; and `room(terms, state)`: permits and microseconds until all are back.
local SKEW, ROUNDED = 1e6, 1 + 2 ^ -32
local KINDS = {}

local function terms_of(kind, limit, period, burst, most)
  return {kind = kind, limit = limit, period = period, burst = burst, most = most, interval = period / limit}
end

local function adapted(terms, limit)
  local burst = terms.burst > 1 and max(terms.burst * (limit / terms.limit), 1) or terms.burst
  return terms_of(terms.kind, terms.kind == 'bucket' and limit or max(limit, 1), terms.period, burst, terms.most)
end

-- The least whole wait that fits, where `wait` is it but for rounding.
local function exactly(wait, fits)
  local least = ceil(wait)
  if not fits(least) then return least + 1 end
  return fits(least - 1) and least - 1 or least
end

local function bucket_at(terms, state)
  local at, backlog = now, 0
  if state then at, backlog = state[1], state[2] end
  local mended = at - now > SKEW
  if mended then at = now end
  local time = max(at, now)
  local held, most = max(backlog - (time - at), 0), max(terms.burst, terms.most) * terms.interval
  if held > most * ROUNDED then return time, most, true end
  return time, held, mended
end

KINDS.bucket = {
  decide = function(terms, state, cost)
    local time, held, mended = bucket_at(terms, state)
    local need, most = cost * terms.interval, max(terms.burst, cost) * terms.interval * ROUNDED
    if held + need <= most then return 0, {time, held + need}, time + held + need end
    local wait = exactly(held + need - most, function(later) return max(held - later, 0) + need <= most end)
    return wait + (time - now), mended and {time, held}, time + held
  end,
  room = function(terms, state)
    local time, held = bucket_at(terms, state)
    return (terms.burst * terms.interval - held) / terms.interval, held ~= 0 and time - now + held or 0
  end,
  keep = keep,
}
