-- Put before everything else of `admit.lua`: the usual call, let through before the rest is even defined: one bucket, and
-- perhaps a closed circuit, a free place, and one slot of the same bulkhead given back. It decides as the others do, over
-- the same states, and writes nothing unless it lets the call through. For ARGV see there.
-- RETURNS {2, backlog of the bucket after the call, exact, version, circuit}.
while ARGV[5] ~= '' and #ARGV <= 17 do
  local call, match, format = redis.call, string.match, string.format
  local base, now, limit = KEYS[1] .. ':permit:', tonumber(ARGV[1]), tonumber(ARGV[8])
  if not now then
    local time = call('TIME')
    now = (time[1] - 1735689600) * 1000000 + time[2]
  end
  local key, guarded = base .. 'bucket:' .. ARGV[14], ARGV[12] ~= ''
  local found = call('MGET', KEYS[1] .. ':rules:version', key, base .. 'line:' .. ARGV[14],
    guarded and base .. 'circuit:' .. ARGV[11] or key)

  if found[3] then break end
  local held = ARGV[5] + 0
  if found[2] then
    local at, backlog = match(found[2], '^(%S+) (%S+)$')
    if now < at + 0 then break end
    backlog = backlog - (now - at)
    if backlog > ARGV[7] + 0 then break end
    if backlog > 0 then held = backlog + held end
  end
  if held > ARGV[6] + 0 then break end

  local line, who, why
  if guarded and found[4] then
    local newest, oldest, who_size, why_size, told, text = match(found[4], '^(%S+) (%S+) (%d+) (%d+) (closed [^\n]*)\n()')
    if not told or now < newest + 0 or now >= oldest + 0 then break end
    line, who = told, string.sub(found[4], text, text + who_size - 1)
    why = string.sub(found[4], text + who_size, text + who_size + why_size - 1)
  end

  local back, at = ARGV[17], format('%.0f', now)
  if limit > 0 then
    local house, holder = base .. 'slots:' .. ARGV[9], ':' .. ARGV[2]
    if back and ARGV[16] ~= ARGV[9] then break end
    back = back and ':' .. back
    local fields = call('HMGET', house, 'about', holder, back or holder)
    if fields[2] then break end
    local hold, soonest, lasts, count, ends = '0', '1e300', '0', call('HLEN', house) - 1, now + ARGV[10]
    if fields[1] then hold, soonest, lasts = match(fields[1], '^(%S+) (%S+) (%S+)$') end
    if fields[3] then
      local lease, taken = match(fields[3], '^(%S+) (%S+)$')
      if lease + 0 > now then
        local time = math.max(now - taken, 0)
        hold, count = hold + 0, count - 1
        hold = format('%.17g', hold ~= 0 and hold + 0.2 * (time - hold) or time)
      else
        fields[3] = false
      end
    end
    if count >= limit then break end
    if fields[3] then call('HDEL', house, back) end
    local last, longer = format('%.17g', ends), lasts + 0 < ends + 3600e6
    if longer then lasts = format('%.17g', ends + 7200e6) end
    if soonest + 0 > ends then soonest = last end
    call('HSET', house, holder, last .. ' ' .. at, 'about', hold .. ' ' .. soonest .. ' ' .. lasts)
    if longer then call('PEXPIRE', house, format('%.0f', math.ceil((lasts - now) / 1000))) end
  elseif back then
    break
  end

  local after, ttl = format('%.17g', held), math.max(1, math.ceil(held / 1000)) + (ARGV[1] ~= '' and 3600000 or 0)
  call('SET', key, at .. ' ' .. after, 'PX', format('%.0f', ttl))
  return {2, after, found[1] or 0, line, who, why}
end
