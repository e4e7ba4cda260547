-- A request that was just admitted and whose answer is to be cached waits for another one that is making the same answer
-- (then rows of that one land for it too, _rows.lua), or is the one that makes it.
-- `flights`: key of an answer -> the rid that makes it. In records: `flight` of the one that makes it, with `followers`;
-- `joins` of those that wait.
-- KEYS: leader. ARGV: P, epoch, rid, key, most followers, admission row if it joins, admission row if not
-- -> 'joined' | 'first' | 'alone' (neither: it runs by itself) | 'gone'
allow_when_full()
local epoch, rid, key, most = ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])
if not is_leader(epoch) then return fenced('epoch') end
local record, flights = P .. 'r:' .. rid, P .. 'flights'
local v = redis.call('HMGET', record, 'open', 'joins', 'flight', 'n', 'cancel', 'results', 'id', 'p0')
if not v[1] or v[1] == '0' then return 'gone' end
if v[2] then return 'joined' end -- repeated
if v[3] then return 'first' end

local function publish(text)
  for name in string.gmatch(redis.call('HGET', P .. 'live', rid) or '', '%S+') do
    redis.pcall(PUBLISH, P .. 'out:' .. name, text)
  end
end

-- A row with all frames that its journal has.
local function row_of(choice, frames)
  local size, bin = #frames, nil
  if size < 256 then bin = string.char(0xc4, size)
  elseif size < 65536 then bin = string.char(0xc5, math.floor(size / 256), size % 256)
  else
    local high = math.floor(size / 65536)
    bin = string.char(0xc6, math.floor(high / 256), high % 256, math.floor(size / 256) % 256, size % 256)
  end
  local tail = (v[7] and v[7] ~= '') and cmsgpack.pack(v[7]) or '\192'
  return '\149' .. cmsgpack.pack(rid) .. cmsgpack.pack(choice) .. '\0' .. bin .. frames .. tail
end

local wants_result = v[6] and v[6] ~= ''

-- Take over what the owner's journals hold; choices that ended as the model wanted have ended here too, but where a result
-- is to be written: then they are made anew.
local function copy(owner)
  local rows = {}
  for choice = 0, tonumber(v[4]) - 1 do
    local frames = redis.call('GETRANGE', P .. 'j:' .. owner .. ':' .. choice, 0, -1)
    local ended = redis.call('HGET', P .. 'r:' .. owner, 'e' .. choice)
    if frames ~= '' and (not ended or (not wants_result and (ended == 'stop' or ended == 'length'))) then
      redis.call('APPEND', P .. 'j:' .. rid .. ':' .. choice, frames)
      rows[#rows + 1] = row_of(choice, frames)
      if ended then
        redis.call('HSET', record, 'e' .. choice, ended)
        redis.call('HINCRBY', record, 'open', -1)
      end
    end
  end
  return table.concat(rows)
end

local function may_join(owner)
  local o = redis.call('HMGET', P .. 'r:' .. owner, 'open', 'n', 'cancel', 'followers', 'flight')
  if not o[1] or o[1] == '0' or o[2] ~= v[4] or o[3] or o[5] ~= key then return nil, true end
  local _, count = string.gsub(o[4] or '', '%S+', '')
  if count >= most or v[5] or v[8] then return nil, false end
  return o[4] or ''
end

local owner = redis.call('HGET', flights, key)
local followers, over = nil, true
if owner and owner ~= rid then followers, over = may_join(owner) end
if followers then
  redis.call('HSET', record, 'joins', owner, 'cache', 'joined')
  redis.call('HSET', P .. 'r:' .. owner, 'followers', followers .. ' ' .. rid, 'reaches', 1)
  publish(ARGV[6] .. copy(owner))
  return 'joined'
end
redis.call('HSET', record, 'cache', 'miss')
if over then
  redis.call('HSET', flights, key, rid)
  redis.call('HSET', record, 'flight', key)
end
publish(ARGV[7])
return over and 'first' or 'alone'
