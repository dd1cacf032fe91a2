-- A dead letter for a message that was never claimed.
-- ARGV: now ms, copy id, failure, history, envelope (8).
-- RETURNS nothing.
local id, message = ARGV[2], envelope(5)
local record, stored = load(id)
if record and record.st == 'dead' then return end
local letter = fresh(message)
letter.st, letter.why = 'dead', ARGV[3]
if ARGV[4] ~= '' then letter.log = ARGV[4] end
store(id, stored, letter)
redis.call('SET', name('wire', id), message.wire)
