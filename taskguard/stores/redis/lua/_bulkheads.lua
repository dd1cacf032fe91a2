-- The places of a bulkhead, as `bulkheads.py` has them: a hash with ":" and the holder for each, "end of lease, taken at".
-- Its field "about" is three numbers: hold, the moving average; an instant before which no lease ends; and one until
-- which the key stays for sure. Leases that are over are looked for only where the place looks full or one is due.
local WEIGHT, UNKNOWN, KEPT, NO_LEASE = 0.2, 1e6, 3600e6, 1e300
local SHORTEST, SHORTEST_UNKNOWN = 1e3, 50e3

local function bulkhead(id)
  local house = {key = base .. 'slots:' .. id}
  house.about = numbers(call('HGET', house.key, 'about')) or {0, NO_LEASE, 0}
  return house
end

local function lease_of(house, holder)
  local lease = numbers(call('HGET', house.key, ':' .. holder))
  if lease and lease[1] > now then return lease end
end

local function spacing_of(house, limit)
  return house.about[1] ~= 0 and house.about[1] / limit or UNKNOWN / limit
end

local function keep_about(house)
  local about = house.about
  call('HSET', house.key, 'about', format('%.17g %.17g %.17g', about[1], about[2], about[3]))
end

local function drop_ended(house)
  local fields, soonest = call('HGETALL', house.key), NO_LEASE
  for i = 1, #fields, 2 do
    if fields[i] ~= 'about' then
      local ends = numbers(fields[i + 1])[1]
      if ends <= now then call('HDEL', house.key, fields[i]) else soonest = min(soonest, ends) end
    end
  end
  house.about[2] = soonest
  if fields[1] then keep_about(house) end
end

-- The wait for a place, 0 where there is one.
local function place(house, holder, limit)
  if call('HLEN', house.key) - 1 < limit or lease_of(house, holder) then return 0 end
  local free = max(spacing_of(house, limit), house.about[1] ~= 0 and SHORTEST or SHORTEST_UNKNOWN)
  if house.about[2] - now < free then
    drop_ended(house)
    if call('HLEN', house.key) - 1 < limit then return 0 end
  end
  return ceil(min(house.about[2] - now, free))
end

local function take(house, holder, lease)
  local held, about = lease_of(house, holder), house.about
  local ends = max(held and held[1] or 0, now + lease)
  call('HSET', house.key, ':' .. holder, format('%.17g %.17g', ends, held and min(held[2], now) or now))
  about[2] = min(about[2], ends)
  local longer = about[3] < ends + KEPT
  if longer then about[3] = ends + KEPT * 2 end
  keep_about(house)
  if longer then call('PEXPIRE', house.key, ttl(about[3])) end
end

local function give_back(house, holder)
  local lease, about = lease_of(house, holder), house.about
  if not lease then return false end
  local held = now - min(lease[2], now)
  call('HDEL', house.key, ':' .. holder)
  about[1] = about[1] ~= 0 and about[1] + WEIGHT * (held - about[1]) or held
  keep_about(house)
  return true
end
