-- All rules, unless their version is known.
-- ARGV: now ms, known version.
-- RETURNS nil, or {version, JSON of each rule}.
local found = version()
if found == tonumber(ARGV[2]) then return nil end
local reply = redis.call('HVALS', base .. ':rules')
table.insert(reply, 1, string.format('%.0f', found))
return reply
