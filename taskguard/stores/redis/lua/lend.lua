-- Take as many permits of one bucket as there are, up to a number, for a lease.
-- KEYS[1] the partition.
-- ARGV: now us, name, how many at most, terms (limit, period us, burst, most).
-- RETURNS {permits, us until one more could be had where it fell short, else 0}.
local key, most = base .. 'bucket:' .. ARGV[2], tonumber(ARGV[3])
local terms = terms_of('bucket', unpack(numbers(ARGV[4])))
local found = call('MGET', key, base .. 'line:' .. ARGV[2])
local state, stands = numbers(found[1]), stands_until(numbers(found[2]))
if stands ~= 0 then return {0, ceil(stands + terms.interval - now)} end

local time, held = bucket_at(terms, state)
local permits = min(most, floor(terms.most), max(floor((terms.burst * terms.interval - held) / terms.interval) + 1, 0))
local wait, after, lasts
while permits > 0 do
  wait, after, lasts = KINDS.bucket.decide(terms, state, permits)
  if wait == 0 then break end
  permits = permits - 1
end
if permits > 0 then keep(key, after, lasts) end
if permits == most then return {permits, 0} end
return {permits, ceil((KINDS.bucket.decide(terms, permits > 0 and after or state, 1)))}
