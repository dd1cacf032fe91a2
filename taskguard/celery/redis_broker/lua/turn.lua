-- Let go of what is acknowledged, then move messages from their queues to `unacked`. Items are not parsed for routing:
-- an entry says "anonymous exchange, this queue", so whoever restores it puts it back where it was.
-- KEYS: hash, index, owners; the queues of the first priority, those of the second, and so on.
-- ARGV: acknowledged tags (a), to take (n), queues a priority (q), 1 to take from them in turn, epoch seconds,
--       owner, lease ms (0: none), first number, the a tags, the q queues' names in JSON.
-- RETURNS position of the queue and item, for each message; its tag is owner:number. The error of a queue that cannot
-- be taken from, where nothing was taken from others.
local acked, wanted, width, fair = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4] == '1'
local owner, lease, number = ARGV[6], tonumber(ARGV[7]), tonumber(ARGV[8])
local taken, n, refusal = {}, 0, nil
for i = 9, 8 + acked do
  redis.call('HDEL', KEYS[1], ARGV[i])
  redis.call('ZREM', KEYS[2], ARGV[i])
end

if wanted > 0 then
  -- What is no hash or index is an error here: after an item has left its queue it would be too late.
  redis.call('HLEN', KEYS[1])
  redis.call('ZCARD', KEYS[2])
  redis.call('ZCARD', KEYS[3])
end

local function take(position)
  local item = redis.pcall('RPOP', KEYS[position])
  if type(item) == 'table' then refusal = item end
  if type(item) ~= 'string' then return false end
  local tag, queue = owner .. ':' .. number, ARGV[9 + acked + (position - 4) % width]
  redis.call('HSET', KEYS[1], tag, '[' .. readable(item, tag, queue) .. ', "", ' .. queue .. ']')
  redis.call('ZADD', KEYS[2], ARGV[5], tag)
  number, n = number + 1, n + 1
  taken[2 * n - 1], taken[2 * n] = position - 4, item
  return true
end

for level = 4, #KEYS, math.max(width, 1) do
  local again = true
  while again and n < wanted do
    again = false
    for position = level, level + width - 1 do
      while n < wanted and take(position) do
        again = true
        if fair then break end
      end
    end
  end
end

if n > 0 and lease > 0 then
  local time = redis.call('TIME')
  redis.call('ZADD', KEYS[3], time[1] * 1000 + math.floor(time[2] / 1000) + lease, owner)
end
if n == 0 and refusal then return refusal end
return taken
