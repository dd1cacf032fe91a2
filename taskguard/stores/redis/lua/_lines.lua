-- The line beside a limit, as `line.py` has it. It rests as one string of numbers: plan, late, then slots given back.
local RETURNED = 64

local function stands_until(state) return state and state[1] > now and state[1] or 0 end

-- Its slots given back that are still to come, in a copy of the line.
local function live_line(state)
  local after = {state and state[1] or 0, state and state[2] or 0}
  for i = 3, state and #state or 0 do
    if state[i] > now then after[#after + 1] = state[i] end
  end
  return after
end

local function book(state, wait, spacing, booked)
  local after, soonest = live_line(state), now + wait
  if booked then
    after[2] = max(soonest, after[2] + spacing)
    return after[2], after
  end
  for i = 3, #after do
    if after[i] >= soonest then return table.remove(after, i), after end
  end
  after[1] = max(soonest, after[1] + spacing)
  return after[1], after
end

local function moved(state, slot, booked)
  local after = {state and state[1] or 0, state and state[2] or 0}
  for i = 3, state and #state or 0 do after[i] = state[i] end
  local place = booked and 2 or 1
  after[place] = max(after[place], slot)
  return after
end

local function unbook(state, slot)
  if not state then return nil end
  local after = live_line(state)
  slot = min(slot, after[1])
  if slot <= now or #after - 2 >= RETURNED then return nil end
  local at = #after + 1
  for i = #after, 3, -1 do
    if after[i] == slot then return nil end
    if after[i] > slot then at = i end
  end
  table.insert(after, at, slot)
  return after
end

local function keep_line(key, state) keep(key, state, max(state[1], state[2])) end
