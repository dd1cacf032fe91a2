-- Put messages back into their queues, each only if it is still unacknowledged; so nobody can do it twice. One that its
-- queue does not take (the key is no list) stays unacknowledged.
-- KEYS: hash, index, then the queue of each message.
-- ARGV: RPUSH (the end that is consumed) or LPUSH, then tag and item of each.
-- RETURNS how many went back; the error of the last that was not taken, if there is one.
local given, refusal = 0, nil
redis.call('HDEL', KEYS[1], '') -- a full server refuses what grows as a script's first write, and never later
for i = 3, #KEYS do
  local tag, item = ARGV[2 * i - 4], ARGV[2 * i - 3]
  local pushed = redis.call('HEXISTS', KEYS[1], tag) == 1 and redis.pcall(ARGV[1], KEYS[i], item)
  if type(pushed) == 'table' then
    refusal = pushed
  else
    redis.call('HDEL', KEYS[1], tag)
    redis.call('ZREM', KEYS[2], tag)
    if pushed then given = given + 1 end
  end
end
return refusal or given
