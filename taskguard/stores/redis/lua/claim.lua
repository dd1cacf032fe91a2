-- Take custody of a message, or say why not.
-- ARGV: now ms, id, holder, lease ms, max crashes, retention of a revoked message ms, envelope (8).
-- RETURNS {'claimed' | 'poisoned', token, crashes, history} and 1 when this holder is told again, {'completed', result}, {'superseded'},
--   {'in_progress', same message 0/1, task id, ms until the lease ends}, {'conflict', task id}, {'buried', failure},
--   {'dropped', reason}.
local id, holder, message = ARGV[2], ARGV[3], envelope(7)
local record, stored = load(id)
local revoked = tonumber(redis.call('GET', name('revoked', message.tid)) or 0) > now

if not stored and not revoked then  -- a key never seen, as nearly all are
  return {ARGV[5] == '0' and 'poisoned' or 'claimed', first_run(id, message, holder, ARGV[4]), 0, ''}
end
local base_record = record

if record then
  local same = record.tid == message.tid
  local due, newer = tonumber(record.due or now), tonumber(message.seq or 0) - tonumber(record.seq or 0)
  if not same and record.st ~= 'dead' and record.st ~= 'discarded' then
    if record.fp ~= message.fp then return {'conflict', record.tid} end
    if record.st == 'done' then return {'completed', redis.call('GET', name('result', id)) or ''} end
    return {'in_progress', 0, record.tid, math.max(0, due - now)}
  end
  if record.st == 'done' then return {'completed', redis.call('GET', name('result', id)) or ''} end
  if record.st == 'dead' or record.st == 'discarded' then
    if same and newer <= 0 then return {record.st == 'dead' and 'buried' or 'dropped', record.why or ''} end
    base_record = nil
  elseif newer < 0 then
    return {'superseded'}
  elseif record.st == 'running' then
    if record.who == holder then return {'claimed', record.tok, record.cr or 0, record.log or '', 1} end
    if due > now then return {'in_progress', newer == 0 and 1 or 0, record.tid, due - now} end
    base_record = crashed(record)
  end
end

if record and record.st == 'dead' and record.tid ~= message.tid then  -- displaced: the letter is kept as a copy
  local letter, _, at_copy = clone(record), load(record.cp)
  letter.cp = nil
  store(record.cp, at_copy, letter)
  redis.call('SET', name('wire', record.cp), redis.call('GET', name('wire', id)) or '')
end

local after = base_record and clone(base_record) or fresh(message, true)
after.st, after.tid, after.key, after.cp, after.seq, after.fp, after.q =
  'running', message.tid, message.key, message.copy, message.seq, message.fp, message.q
after.tok = math.max((stored and stored.tok or 0) + 1, now)
after.who, after.due, after.at, after.ls, after.kp, after.exp = holder, now + ARGV[4], now, nil, nil, nil

if revoked then
  after = ended(id, after, 'discarded', ARGV[6])
  after.why = 'revoked'
  store(id, stored, after)
  wake(id)
  return {'dropped', 'revoked'}
end
store(id, stored, after)
redis.call('SET', name('wire', id), message.wire)
local crashes = tonumber(after.cr or 0)
return {crashes >= tonumber(ARGV[5]) and 'poisoned' or 'claimed', after.tok, crashes, after.log or ''}
