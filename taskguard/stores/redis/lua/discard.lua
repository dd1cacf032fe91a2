-- The run ended without an effect; those that wait for it are woken.
-- ARGV: now ms, id, token, reason, retention ms.
-- RETURNS 1, or 0 when the token is stale.
local id = ARGV[2]
local record = load(id)
if not owned(record, ARGV[3]) then return made(record, ARGV[3], 'discarded') end
local stone = ended(id, record, 'discarded', ARGV[5])
stone.why = ARGV[4]
store(id, record, stone)
wake(id)
return 1
