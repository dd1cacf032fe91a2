-- Remove records whose time is over.
-- ARGV: now ms, limit.
-- RETURNS how many.
local over = redis.call('ZRANGE', base .. ':expiry', '-inf', now, 'BYSCORE', 'LIMIT', 0, ARGV[2])
for _, id in ipairs(over) do
  local _, record = load(id)
  if record then erase(id, record) else redis.call('ZREM', base .. ':expiry', id) end
end
return #over
