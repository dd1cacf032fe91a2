-- How many records are in each state, and since when the oldest.
-- ARGV: now ms, states.
-- RETURNS a flat list: count, instant of the oldest entry ms or empty, for each state.
local depths = {}
for i = 2, #ARGV do
  local index = name('state', ARGV[i])
  depths[#depths + 1] = redis.call('ZCARD', index)
  local oldest = redis.call('ZRANGE', index, 0, 0, 'WITHSCORES')[2] or ''
  if ARGV[i] == 'running' and oldest ~= '' then  -- in the order of their leases; there are never many
    oldest = now
    for _, id in ipairs(redis.call('ZRANGE', index, 0, -1)) do
      local found = redis.call('HMGET', name('record', id), 'at', 'tok')
      oldest = math.min(oldest, tonumber(found[1] or found[2] or now))
    end
    oldest = string.format('%.0f', oldest)
  end
  depths[#depths + 1] = oldest
end
return depths
