-- Lease due messages to a relay, the longest due first; runs whose lease ended are counted as crashed.
-- ARGV: now ms, limit, lease ms, name of the lease.
-- RETURNS a flat list: id, wire, crashes, id, wire, crashes, ...
local found, taken = {}, {}
for _, index in ipairs({base .. ':due', name('state', 'running')}) do
  local due = redis.call('ZRANGE', index, '-inf', now, 'BYSCORE', 'LIMIT', 0, ARGV[2], 'WITHSCORES')
  for i = 1, #due, 2 do found[#found + 1] = {id = due[i], at = tonumber(due[i + 1]), index = index} end
end
table.sort(found, function(a, b) return a.at < b.at or a.at == b.at and a.id < b.id end)

for i = 1, math.min(#found, tonumber(ARGV[2])) do
  local id = found[i].id
  local _, record = load(id)
  if record then
    local after = record.st == 'running' and crashed(record) or clone(record)
    after.ls, after.due = ARGV[4], now + ARGV[3]
    store(id, record, after)
    taken[#taken + 1] = id
    taken[#taken + 1] = redis.call('GET', name('wire', id)) or ''
    taken[#taken + 1] = after.cr or 0
  else
    redis.call('ZREM', found[i].index, id)  -- somebody deleted the record by hand
  end
end
return taken
