-- Take custody, ask for the run's permits, and let the message rest where a rate gives it a slot to come back for.
-- `claim`, `admit` and `rest` are the scripts of these names, each with its prologues, as functions.
-- ARGV: now ms, number of arguments of a claim without the instant, those; number of arguments of a rest, 0 where the
--   message is not to rest, those (deadline ms or empty, line of history, envelope (8)); the arguments of an admission.
-- RETURNS {claim}, where that is another than a first 'claimed' or where the admission fails, which is then asked for by
--   itself and tells why; or {claim, admission, ms due or 0}.
local claims, rests = 2, 3 + ARGV[2]
local asks = rests + 1 + ARGV[rests]
local claimed = claim(KEYS, {ARGV[1], unpack(ARGV, claims + 1, rests - 1)})
if claimed[1] ~= 'claimed' or claimed[5] then return {claimed} end

local sound, answer = pcall(admit, KEYS, {unpack(ARGV, asks)})
if not sound then return {claimed} end
local due = 0
if rests + 1 < asks and answer[1] == 1 and answer[2] ~= 'circuit' and answer[5] >= 0 then
  local now, deadline = tonumber(ARGV[asks]), tonumber(ARGV[rests + 1])
  if not now then
    local time = redis.call('TIME')
    now = (time[1] - 1735689600) * 1000000 + time[2]
  end
  local slot = 1735689600000 + math.ceil((now + answer[5]) / 1000)
  if not deadline or slot < deadline then
    local token, told = string.format('%.0f', claimed[2]), string.format('%.0f', slot)
    if rest(KEYS, {ARGV[1], ARGV[3], token, told, unpack(ARGV, rests + 2, asks - 1)}) == 1 then due = slot end
  end
end
return {claimed, answer, due}
