-- Set an adaptive limit, and keep why.
-- KEYS[1] the partition.
-- ARGV: now us, name, limit, why, changes kept, us for which it outlives its last change.
-- RETURNS {limit, changes: "us before after why", newest first}.
local key, list = base .. 'adaptive:' .. ARGV[2], base .. 'adapted:' .. ARGV[2]
local before, lasts = call('GET', key) or ARGV[3], ttl(now + ARGV[6])
call('SET', key, ARGV[3], 'PX', lasts)
call('LPUSH', list, format('%.0f %s %s %s', now, before, ARGV[3], ARGV[4]))
call('LTRIM', list, 0, ARGV[5] - 1)
call('PEXPIRE', list, lasts)
return {ARGV[3], call('LRANGE', list, 0, -1)}
