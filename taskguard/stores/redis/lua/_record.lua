-- Prepended to every script: reading and writing one record with its indexes, and the steps several scripts share.
-- It is the translation of `lifecycle.py`; names are the same where the step is.
--
-- KEYS[1]  the partition, "{tg:<namespace>:<partition>}". Every key of a script is this one and a suffix, so that all
--          share its hash tag, also those that only an index names.
-- ARGV[1]  now, epoch ms; empty: the server's clock.
--
-- A record is a hash of short fields, absent where they are empty:
--   st state, task, tid task id, key (absent where it is the task id), cp id of its message's copy (only primaries),
--   q queue, fp fingerprint, seq sequence, tok token, who holder, cr crashes, ls lease, kp kept, due ms, exp ms, on waits on, why failure,
--   log history, new created ms, at entered its state ms. A first run has neither of the two: both are its token. A
--   sequence that is absent is 0.
-- The long texts rest beside it (`:wire:`, `:result:`), because one long field costs a hash its compact form.

local base, now = KEYS[1], tonumber(ARGV[1])
if not now then
  local time = redis.call('TIME')
  now = time[1] * 1000 + math.floor(time[2] / 1000)
end

local TERMINAL = {done = true, dead = true, discarded = true}

local function name(kind, id)
  return base .. ':' .. kind .. ':' .. id
end

local function clone(record)
  local copy = {}
  for field, value in pairs(record) do copy[field] = value end
  return copy
end

-- The record, nil when there is none or its time is over; what is stored in either case; and that as HGETALL gave it.
local function load(id)
  local flat = redis.call('HGETALL', name('record', id))
  if not flat[1] then return nil, nil end
  local record = {}
  for i = 1, #flat, 2 do record[flat[i]] = flat[i + 1] end
  record.new, record.at = record.new or record.tok, record.at or record.tok
  record.cp, record.copy = record.cp or record.copy, nil  -- as the first versions wrote it, and a sequence of 0
  if record.seq == '0' then record.seq = nil end
  if record.exp and tonumber(record.exp) <= now then return nil, record, flat end
  return record, record, flat
end

local function reindex(index, id, old, new)
  if old == new then return end
  if new then redis.call('ZADD', base .. index, new, id) else redis.call('ZREM', base .. index, id) end
end

-- Tell the relays that something is due sooner than all they know of; no oftener than they look, for who is told looks
-- once more a poll later. Where this user may not publish they find it when they look by themselves.
local function reindex_due(id, old, new)
  reindex(':due', id, old, new)
  if new and (not old or tonumber(new) < tonumber(old)) and redis.call('ZRANGE', base .. ':due', 0, 0)[1] == id
    and redis.call('SET', base .. ':rung', '', 'NX', 'PX', 250) then
    redis.pcall('PUBLISH', base .. ':due', '')
  end
end

-- Where a record stands in the index of its state: a run by the end of its lease, all others by their entry. So a run
-- needs no place in `due` as well, where everything else is that becomes due.
local function place(record) return record.st == 'running' and record.due or record.at end
local function rests_until(record) return record.st ~= 'running' and record.due or nil end

-- Write what differs between the stored record `old` (or nil) and `new`, and keep the indexes true.
local function store(id, old, new)
  old = old or {}
  local set, gone, token_is_new = {}, {}, old.tok ~= new.tok
  for field, value in pairs(new) do
    if old[field] ~= value or token_is_new and (field == 'new' or field == 'at') then
      set[#set + 1] = field
      set[#set + 1] = value
    end
  end
  for field in pairs(old) do
    if new[field] == nil then gone[#gone + 1] = field end
  end
  if gone[1] then redis.call('HDEL', name('record', id), unpack(gone)) end
  if set[1] then redis.call('HSET', name('record', id), unpack(set)) end
  if old.st and old.st ~= new.st then redis.call('ZREM', name('state', old.st), id) end
  if old.st ~= new.st or place(old) ~= place(new) then redis.call('ZADD', name('state', new.st), place(new), id) end
  reindex_due(id, rests_until(old), rests_until(new))
  reindex(':expiry', id, old.exp, new.exp)
  if old.on and old.on ~= new.on then redis.call('SREM', name('waiters', old.on), id) end
  if new.on and old.on ~= new.on then redis.call('SADD', name('waiters', new.on), id) end
  if old.st == 'done' and new.st ~= 'done' then redis.call('DEL', name('result', id)) end
end

local function erase(id, old)
  redis.call('DEL', name('record', id), name('wire', id), name('result', id))
  redis.call('ZREM', name('state', old.st), id)
  reindex(':due', id, rests_until(old), nil)
  reindex(':expiry', id, old.exp, nil)
  if old.on then redis.call('SREM', name('waiters', old.on), id) end
end

-- The envelope whose fields start at ARGV[i]: task, key, task id, copy id, queue, fingerprint, sequence, wire.
local function envelope(i)
  local key = ARGV[i + 1] ~= ARGV[i + 2] and ARGV[i + 1] or nil
  return {task = ARGV[i], key = key, tid = ARGV[i + 2], copy = ARGV[i + 3], q = ARGV[i + 4],
    fp = ARGV[i + 5], seq = ARGV[i + 6] ~= '0' and ARGV[i + 6] or nil, wire = ARGV[i + 7]}
end

local function fresh(message, primary)
  return {st = 'pending', task = message.task, key = message.key, tid = message.tid,
    cp = primary and message.copy or nil, q = message.q, fp = message.fp, seq = message.seq, new = now, at = now}
end

-- What `claim` writes of a key never seen, without the steps that look for what was there. Returns the token.
local function first_run(id, message, holder, lease)
  local at, due = string.format('%.0f', now), string.format('%.0f', now + lease)
  redis.call('HSET', name('record', id), 'st', 'running', 'task', message.task, 'tid', message.tid, 'cp', message.copy,
    'q', message.q, 'fp', message.fp, 'tok', at, 'who', holder, 'due', due)
  if message.key then redis.call('HSET', name('record', id), 'key', message.key) end
  if message.seq then redis.call('HSET', name('record', id), 'seq', message.seq) end
  redis.call('ZADD', name('state', 'running'), due, id)
  redis.call('SET', name('wire', id), message.wire)
  return at
end

local function append_history(record, line)
  if line == '' then return end
  local lines = record.log and record.log .. '\n' .. line or line
  local _, breaks = string.gsub(lines, '\n', '')
  for _ = 20, breaks do lines = string.match(lines, '\n(.*)$') end
  record.log = lines
end

local function line(worker, outcome, error)
  return string.format('{"at_ms":%.0f,"worker":%s,"outcome":"%s","error":"%s"}', now,
    (string.gsub(cjson.encode(worker), '\\/', '/')), outcome, error)
end

local function owned(record, token)
  return record and record.st == 'running' and record.tok == token
end

-- 1 when the same step was made already and only its reply was lost, 0 when it comes too late.
local function made(record, token, state, sequence)
  local same = record and record.tok == token and record.st == state
  return same and (not sequence or (record.seq or '0') == sequence) and 1 or 0
end

local function crashed(record, attempt)
  local after = clone(record)
  after.st, after.at, after.due = 'pending', now, now
  after.cr, after.tok = (after.cr or 0) + 1, (after.tok or 0) + 1
  append_history(after, attempt or line(record.who or '', 'crash', 'lease ended'))
  after.who, after.kp, after.ls = nil, nil, nil
  return after
end

local function rest(id, record, message, due, attempt)
  local after = clone(record)
  after.st, after.at, after.due, after.exp = 'pending', now, due, nil
  after.seq, after.fp, after.q = message.seq, message.fp, message.q
  after.who, after.ls, after.kp = nil, nil, nil
  append_history(after, attempt)
  redis.call('SET', name('wire', id), message.wire)
  return after
end

-- To a terminal state. A kept message stays until it is finished, a dead letter's for ever.
local function ended(id, record, state, retention)
  local after = clone(record)
  after.st, after.at, after.exp = state, now, retention and (after.kp and after.due or now) + retention
  if not after.kp then
    after.who, after.due = nil, nil
    if state ~= 'dead' then redis.call('DEL', name('wire', id)) end
  end
  return after
end

local function let_go(id, record)
  local after = clone(record)
  after.who, after.ls, after.kp, after.due = nil, nil, nil, nil
  if after.st ~= 'dead' then redis.call('DEL', name('wire', id)) end
  return after
end

local function wake(id)
  for _, waiter in ipairs(redis.call('SMEMBERS', name('waiters', id))) do
    local record = load(waiter)
    if record and record.st == 'pending' and record.on == id then
      local after = clone(record)
      after.on, after.due = nil, now
      store(waiter, record, after)
    end
  end
end

local function unique_holder(unique)
  local until_ms, task_id = string.match(redis.call('GET', name('unique', unique)) or '', '^(%d+):(.*)$')
  return until_ms and tonumber(until_ms) > now and task_id or nil
end
