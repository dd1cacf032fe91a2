-- Keep a message beside its key's record until it is due, or until the record it waits on ends.
-- ARGV: now ms, copy id, due ms, id of the awaited record or empty, relay lease or empty, unique name or empty,
--   ms to hold that name, envelope (8).
-- RETURNS the task id that holds the unique name, else the message's own.
local id, due, awaited, unique, message = ARGV[2], tonumber(ARGV[3]), ARGV[4], ARGV[6], envelope(8)
if unique ~= '' then
  local holder = unique_holder(unique)
  if holder and holder ~= message.tid then return holder end
  local value = string.format('%.0f:%s', now + ARGV[7], message.tid)
  redis.call('SET', name('unique', unique), value, 'PX', ARGV[7] + 3600000)
end
local record, stored = load(id)
-- A copy that a relay may be publishing came back to rest: without a new write its removal would take the only copy.
local published = record and record.st == 'pending' and record.ls and record.ls ~= ARGV[5]
if record and not published then return message.tid end
record = fresh(message)
if awaited ~= '' then
  local primary = load(awaited)
  if primary and not TERMINAL[primary.st] then record.on = awaited else due = math.min(due, now) end
end
record.due = due
if ARGV[5] ~= '' then record.ls = ARGV[5] end
store(id, stored, record)
redis.call('SET', name('wire', id), message.wire)
return message.tid
