-- Prepended to every script about permits: the instant, the names of keys, numbers as they rest.
--
-- KEYS[1]  the partition, "{tg:<namespace>:<partition>}". Every key of a script is this one and a suffix that begins
--          with ":permit:", so that all share its hash tag, whatever the names in them look like.
-- ARGV[1]  now, microseconds since 2025-01-01 UTC; empty: the server's clock.
--
-- Instants and durations are doubles of microseconds, as in `limits.py`; a state keeps all 17 digits of them.
local base, now, GIVEN = KEYS[1] .. ':permit:', tonumber(ARGV[1]), ARGV[1] ~= ''
if not now then
  local time = redis.call('TIME')
  now = (time[1] - 1735689600) * 1000000 + time[2]
end

local call, format = redis.call, string.format
local floor, ceil, max, min, fmod = math.floor, math.ceil, math.max, math.min, math.fmod

-- Milliseconds for which a key must stay to be there until an instant: rounded up and never 0, which would delete it.
-- A clock that is given may stand still while the server's goes on, so a test's state stays an hour longer.
local function ttl(until_us)
  return format('%.0f', max(1, ceil((until_us - now) / 1000)) + (GIVEN and 3600000 or 0))
end

local function numbers(text)
  if not text then return nil end
  local list, n = {}, 0
  for number in string.gmatch(text, '%S+') do
    n = n + 1
    list[n] = tonumber(number)
  end
  return list
end

-- Keep a list of numbers until an instant.
local function keep(key, list, until_us)
  local parts = {}
  for i = 1, #list do parts[i] = format('%.17g', list[i]) end
  call('SET', key, table.concat(parts, ' '), 'PX', ttl(until_us))
end
