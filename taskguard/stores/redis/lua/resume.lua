-- Workers consume a queue again, and are told.
-- KEYS[1] the partition.
-- ARGV: now us, queue.
-- RETURNS 1 where it was paused, else 0.
local ends = call('ZSCORE', base .. 'pauses', ARGV[2])
call('ZREM', base .. 'pauses', ARGV[2])
call('HDEL', base .. 'pauses:words', ARGV[2])
redis.pcall('PUBLISH', base .. 'pauses', '')
return ends and tonumber(ends) > now and 1 or 0
