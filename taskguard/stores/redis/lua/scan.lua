-- One page of the records in a state, the oldest entry first, after a position. An empty page is the end.
-- ARGV: now ms, state, records in a page, position: instant of entry ms and id of the last record seen.
-- RETURNS {instant of entry ms, id, fields and values, wire or nil, result or nil} for each record.
local index, size, from, last = name('state', ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5]
local page, offset = {}, 0
repeat
  local ids = redis.call('ZRANGE', index, ARGV[4], '+inf', 'BYSCORE', 'LIMIT', offset, size, 'WITHSCORES')
  for i = 1, #ids, 2 do
    local id, at = ids[i], ids[i + 1]
    if tonumber(at) > from or id > last then
      local record, _, fields = load(id)
      if record then
        page[#page + 1] = {at, id, fields, redis.call('GET', name('wire', id)), redis.call('GET', name('result', id))}
      end
    end
  end
  offset = offset + size
until page[1] or not ids[1]
return page
