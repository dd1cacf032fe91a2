-- Workers stop consuming a queue, and are told. Pauses that were over a day ago are dropped.
-- KEYS[1] the partition.
-- ARGV: now us, queue, until us or "inf", JSON of who and why.
-- RETURNS how many queues are paused.
local ends, words = base .. 'pauses', base .. 'pauses:words'
call('ZADD', ends, ARGV[3], ARGV[2])
call('HSET', words, ARGV[2], ARGV[4])
for _, queue in ipairs(call('ZRANGEBYSCORE', ends, '-inf', format('%.17g', now - 86400e6))) do
  call('ZREM', ends, queue)
  call('HDEL', words, queue)
end
local last = call('ZRANGE', ends, -1, -1, 'WITHSCORES')[2]
for _, key in ipairs({ends, words}) do
  if last == 'inf' then call('PERSIST', key) elseif last then call('PEXPIRE', key, ttl(tonumber(last))) end
end
redis.pcall('PUBLISH', ends, '')
return call('ZCARD', ends)
