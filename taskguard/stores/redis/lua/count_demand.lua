-- Add to the window that is now: a hash of sums, two fields for each row, "+" and "-" before its name.
-- ARGV: now ms, window ms, ms it is kept, rows at most, the name of all others, then of each row: name, accepted, refused.
-- RETURNS {window's beginning ms, then of each row: accepted, refused; nothing where it was counted as other}.
local window = ARGV[2] * math.floor(now / ARGV[2])
local key = base .. ':demand:' .. string.format('%.0f', window)
local rows = redis.call('HLEN', key) / 2
local sums = {string.format('%.0f', window)}
for i = 6, #ARGV, 3 do
  local name, own = ARGV[i], true
  if redis.call('HEXISTS', key, '+' .. name) == 0 then
    own = rows < tonumber(ARGV[4])
    rows = own and rows + 1 or rows
    name = own and name or ARGV[5]
  end
  local accepted = redis.call('HINCRBYFLOAT', key, '+' .. name, ARGV[i + 1])
  local refused = redis.call('HINCRBYFLOAT', key, '-' .. name, ARGV[i + 2])
  sums[#sums + 1] = own and accepted or ''
  sums[#sums + 1] = own and refused or ''
end
redis.call('PEXPIRE', key, ARGV[3])
return sums
