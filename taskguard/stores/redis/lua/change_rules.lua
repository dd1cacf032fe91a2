-- Change the rules in one step, if they still have the version that the change was made for.
-- ARGV: now ms, expected version, changes kept, the log's JSON without its version and instant, how many rules are put,
--   id and JSON of each, ids of those that go.
-- RETURNS the new version, nil if the rules have moved on. It is later than now, so that it also grows after a loss.
local before = version()
if before ~= tonumber(ARGV[2]) then return nil end
local after = string.format('%.0f', math.max(before + 1, now))
local last = 5 + 2 * tonumber(ARGV[5])
for i = 6, last, 2 do redis.call('HSET', base .. ':rules', ARGV[i], ARGV[i + 1]) end
for i = last + 1, #ARGV do redis.call('HDEL', base .. ':rules', ARGV[i]) end
redis.call('SET', base .. ':rules:version', after)
redis.call('LPUSH', base .. ':rules:log', string.format('%s %.0f %s', after, now, ARGV[4]))
redis.call('LTRIM', base .. ':rules:log', 0, ARGV[3] - 1)
redis.call('PUBLISH', base .. ':rules:changed', after)
return after
