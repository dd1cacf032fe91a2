-- How long until the next message is due: one at rest, or a run whose lease ends.
-- ARGV: now ms.
-- RETURNS ms, negative where one has been due; nothing where none rests and none runs.
local due
for _, index in ipairs({base .. ':due', name('state', 'running')}) do
  local at = tonumber(redis.call('ZRANGE', index, 0, 0, 'WITHSCORES')[2])
  if at and (not due or at < due) then due = at end
end
return due and due - now
