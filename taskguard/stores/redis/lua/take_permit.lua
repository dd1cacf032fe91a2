-- The shortest way through one bucket, the most common ask: what `admit.lua` decides, and the same state.
-- KEYS[1] the bucket, KEYS[2] its line, KEYS[3] the version of the rules.
-- ARGV: now us or empty, need us, most us, full us: cost and capacity in time, as `limits.py` reckons them.
-- RETURNS the backlog after the call, exact, and the version behind it if there is one; {wait us, backlog, version} if it
--   is refused; nil, and nothing is done, where others stand in line or time stands still: ask `admit.lua`.
local now = tonumber(ARGV[1])
if not now then
  local time = redis.call('TIME')
  now = (time[1] - 1735689600) * 1000000 + time[2]
end
local found = redis.call('MGET', KEYS[1], KEYS[2], KEYS[3])
if found[2] then return nil end
local held, need, most = 0, tonumber(ARGV[2]), tonumber(ARGV[3])
if found[1] then
  local at, backlog = string.match(found[1], '^(%S+) (%S+)$')
  if now < at + 0 then return nil end
  held = math.max(backlog - (now - at), 0)
  if held > tonumber(ARGV[4]) then return nil end
end
if held + need <= most then
  local after = string.format('%.17g', held + need)
  local ttl = math.max(1, math.ceil((held + need) / 1000)) + (ARGV[1] ~= '' and 3600000 or 0)
  redis.call('SET', KEYS[1], string.format('%.0f ', now) .. after, 'PX', string.format('%.0f', ttl))
  return found[3] and after .. ' ' .. found[3] or after
end
local wait = math.ceil(held + need - most)
if math.max(held - wait, 0) + need > most then
  wait = wait + 1
elseif math.max(held - (wait - 1), 0) + need <= most then
  wait = wait - 1
end
return {wait, string.format('%.17g', held), found[3] or 0}
