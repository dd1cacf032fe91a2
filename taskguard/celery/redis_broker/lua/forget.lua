-- Forget an owner whose messages were given back, unless it came back to life meanwhile and took others.
-- KEYS: owners. ARGV: owner.
local time = redis.call('TIME')
local ends = redis.call('ZSCORE', KEYS[1], ARGV[1])
if ends and tonumber(ends) <= time[1] * 1000 + math.floor(time[2] / 1000) then
  redis.call('ZREM', KEYS[1], ARGV[1])
end
