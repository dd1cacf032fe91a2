-- Read one record whole.
-- ARGV: now ms, id.
-- RETURNS {fields and values, wire or nil, result or nil}, or nothing.
local record, _, fields = load(ARGV[2])
if not record then return end
return {fields, redis.call('GET', name('wire', ARGV[2])), redis.call('GET', name('result', ARGV[2]))}
