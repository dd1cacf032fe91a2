-- The run failed for good: a dead letter, and those that wait for it are woken.
-- ARGV: now ms, id, token, failure, line of history or empty.
-- RETURNS 1, or 0 when the token is stale.
local id = ARGV[2]
local record = load(id)
if not owned(record, ARGV[3]) then return made(record, ARGV[3], 'dead') end
local letter = ended(id, record, 'dead')
letter.why = ARGV[4]
append_history(letter, ARGV[5])
store(id, record, letter)
wake(id)
return 1
