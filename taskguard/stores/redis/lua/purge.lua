-- Forget a dead letter. A primary leaves a stone, so that an old copy of its message stays dead.
-- ARGV: now ms, id, retention of the stone ms.
-- RETURNS 1, or 0 when it is no dead letter.
local id = ARGV[2]
local record = load(id)
if not record or record.st ~= 'dead' then return 0 end
if not record.cp then
  erase(id, record)
  return 1
end
local letter = clone(record)
letter.kp = nil
local stone = ended(id, letter, 'discarded', ARGV[3])
stone.why = 'purged'
store(id, record, stone)
return 1
