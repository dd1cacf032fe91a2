-- Retry or defer: from the run to a message at rest.
-- ARGV: now ms, id, token, due ms, line of history or empty, envelope (8).
-- RETURNS 1, or 0 when the token is stale.
local id = ARGV[2]
local record, message = load(id), envelope(6)
if not owned(record, ARGV[3]) then return made(record, ARGV[3], 'pending', message.seq or '0') end
store(id, record, rest(id, record, message, tonumber(ARGV[4]), ARGV[5]))
return 1
