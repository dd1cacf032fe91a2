-- The broker has confirmed these messages: forget copies, remember primaries as published, let kept ones go.
-- ARGV: now ms, retention of published records ms, then id and lease of each.
-- RETURNS how many were still under that lease.
local removed = 0
for i = 3, #ARGV, 2 do
  local id, record = ARGV[i], load(ARGV[i])
  if record and record.ls and record.ls == ARGV[i + 1] then
    removed = removed + 1
    if TERMINAL[record.st] then
      store(id, record, let_go(id, record))
    elseif not record.cp then
      erase(id, record)
    else
      local after = let_go(id, record)
      after.st, after.at, after.exp = 'published', now, now + ARGV[2]
      store(id, record, after)
    end
  end
end
return removed
