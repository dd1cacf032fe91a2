-- The paused queues.
-- KEYS[1] the partition.
-- ARGV: now us.
-- RETURNS of each: queue, until us or "inf", JSON of who and why.
local found = {}
local queues = call('ZRANGEBYSCORE', base .. 'pauses', '(' .. format('%.17g', now), '+inf', 'WITHSCORES')
for i = 1, #queues, 2 do
  found[#found + 1], found[#found + 2] = queues[i], queues[i + 1]
  found[#found + 1] = call('HGET', base .. 'pauses:words', queues[i]) or '["",""]'
end
return found
