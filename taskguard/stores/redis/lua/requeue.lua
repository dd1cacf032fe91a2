-- Make a dead letter due again, with all its chances back.
-- ARGV: now ms, id, due ms, envelope (8).
-- RETURNS 1, or 0 when it is no dead letter any more.
local id = ARGV[2]
local record = load(id)
if not record or record.st ~= 'dead' then return 0 end
local after = rest(id, record, envelope(4), tonumber(ARGV[3]), line('operator', 'requeue', ''))
after.why, after.cr = nil, nil
store(id, record, after)
return 1
