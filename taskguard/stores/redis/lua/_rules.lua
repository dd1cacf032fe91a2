-- Prepended to the scripts about rules and demand.
--
-- KEYS[1]  the partition, "{tg:<namespace>:<partition>}". Every key is this one and a suffix.
-- ARGV[1]  now, epoch ms; empty: the server's clock.
--
-- `:rules` is a hash of JSON by id (and of the declared tiers, under an id that no rule can have), `:rules:version` a number that only grows, `:rules:log` a list of JSON, the newest
-- first. They have no TTL: rules are for good. A message on the channel `:rules:changed` is the new version.
local base, now = KEYS[1], tonumber(ARGV[1])
if not now then
  local time = redis.call('TIME')
  now = time[1] * 1000 + math.floor(time[2] / 1000)
end

local function version() return tonumber(redis.call('GET', base .. ':rules:version') or 0) end
