-- The run succeeded: keep its result for its duplicates and wake those that wait.
-- ARGV: now ms, id, token, result, retention ms; and what a result backend keeps here: database, key, payload, seconds
--   (0: for ever).
-- RETURNS 1, or 0 when the token is stale.
local id, key = ARGV[2], name('record', ARGV[2])
local found = redis.call('HMGET', key, 'st', 'tok', 'kp')
if found[1] == 'running' and found[2] == ARGV[3] and not found[3] then  -- what `ended` and `store` would write
  local at, gone_at = string.format('%.0f', now), string.format('%.0f', now + ARGV[5])
  redis.call('HSET', key, 'st', 'done', 'at', at, 'exp', gone_at)
  redis.call('HDEL', key, 'who', 'due')
  redis.call('ZREM', name('state', 'running'), id)
  redis.call('ZADD', name('state', 'done'), at, id)
  redis.call('ZADD', base .. ':expiry', gone_at, id)
  redis.call('DEL', name('wire', id))
else
  local record = load(id)
  if not owned(record, ARGV[3]) then return made(record, ARGV[3], 'done') end
  store(id, record, ended(id, record, 'done', ARGV[5]))
end
redis.call('SET', name('result', id), ARGV[4])
wake(id)
if ARGV[6] then
  redis.call('SELECT', ARGV[6])
  if ARGV[9] == '0' then redis.call('SET', ARGV[7], ARGV[8]) else redis.call('SETEX', ARGV[7], ARGV[9], ARGV[8]) end
  redis.call('PUBLISH', ARGV[7], ARGV[8])
end
return 1
