-- The child of this run died: count it and make the message due now, also when it died before it could claim.
-- ARGV: now ms, id, holder, line of history, envelope (8).
-- RETURNS 1, or 0 when the run has already ended or is another holder's.
local id, message = ARGV[2], envelope(5)
local record, stored = load(id)
if record and record.st == 'running' then
  if record.who ~= ARGV[3] then return 0 end
elseif not record then
  record = fresh(message, true)
  redis.call('SET', name('wire', id), message.wire)
elseif record.st == 'published' and record.tid == message.tid and record.seq == message.seq then
  record = clone(record)
  record.exp = nil
  redis.call('SET', name('wire', id), message.wire)
else
  return 0
end
store(id, stored, crashed(record, ARGV[4]))
return 1
