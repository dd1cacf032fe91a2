-- Prolong the leases of these runs; with `keep` each record becomes the only copy of its message.
-- ARGV: now ms, lease ms, keep 0/1, then id and holder of each run.
-- RETURNS a list of 1 or 0, one for each run.
local renewed = {}
for i = 4, #ARGV, 2 do
  local record = load(ARGV[i])
  local held = record and record.st == 'running' and record.who == ARGV[i + 1]
  if held then
    local after = clone(record)
    after.due = now + ARGV[2]
    if ARGV[3] == '1' then after.kp = '1' end
    store(ARGV[i], record, after)
  end
  renewed[#renewed + 1] = held and 1 or 0
end
return renewed
