-- Put a message before all others in its queue, but behind those that were put there before it.
-- KEYS: the queue's list, which is taken from its right end.
-- ARGV: the message, what marks a message that was put ahead, how many such are looked at.
-- RETURNS how many it stands behind.
local ahead, most = 0, tonumber(ARGV[3])
while ahead < most do
  local item = redis.call('LINDEX', KEYS[1], -1 - ahead)
  if not item or not string.find(item, ARGV[2], 1, true) then break end
  ahead = ahead + 1
end
local before = ahead > 0 and redis.call('RPOP', KEYS[1], ahead) or {}
redis.call('RPUSH', KEYS[1], ARGV[1])
for i = #before, 1, -1 do
  redis.call('RPUSH', KEYS[1], before[i])
end
return ahead
