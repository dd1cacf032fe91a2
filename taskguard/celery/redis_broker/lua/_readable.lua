-- The form in which an item is noted as unacknowledged. Where a stock worker restores it, it must be able to read it:
-- so what is no message is noted as a message about its bytes.
local DIGITS = 'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/'
local function base64(bytes)
  return ((bytes:gsub('..?.?', function(group)
    local a, b, c = group:byte(1, 3)
    local bits, text = a * 65536 + (b or 0) * 256 + (c or 0), ''
    for shift = 3, 0, -1 do
      local digit = math.floor(bits / 64 ^ shift) % 64 + 1
      text = text .. DIGITS:sub(digit, digit)
    end
    return text:sub(1, #group + 1) .. ('='):rep(3 - #group)
  end)))
end

local function readable(item, tag, queue)
  local ok, message = pcall(cjson.decode, item)
  if ok and type(message) == 'table' and type(message.body) == 'string'
    and type(message.properties) == 'table' and message.properties.delivery_tag then
    return item
  end
  return '{"body": "' .. base64(item) .. '", "content-type": "application/octet-stream", "content-encoding": "binary", '
    .. '"headers": {}, "properties": {"type": "taskguard.undecodable", "body_encoding": "base64", "priority": 0, '
    .. '"delivery_tag": "' .. tag .. '", "delivery_info": {"exchange": "", "routing_key": ' .. queue .. '}}}'
end
