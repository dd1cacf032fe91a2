-- All that follows the outcome of these runs is done: let their kept messages go.
-- ARGV: now ms, then id and holder of each run.
-- RETURNS nothing.
for i = 2, #ARGV, 2 do
  local record = load(ARGV[i])
  if record and TERMINAL[record.st] and record.kp and record.who == ARGV[i + 1] then
    store(ARGV[i], record, let_go(ARGV[i], record))
  end
end
