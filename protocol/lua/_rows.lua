-- The rows of `commit` and `finish`: land each, end choices and requests, publish what landed.
-- A row is nine arguments: rid, choice, placement, cursor, finish, result, head, frames, tail ('' = none).

local retention -- milliseconds that an ended request's keys stay

-- True if the journal already holds exactly these bytes at this place: a repeated call finds its own row.
local function holds(journal, cursor, frames)
  return #frames > 0 and redis.call('GETRANGE', journal, cursor, cursor + #frames - 1) == frames
end

local function end_running(tenant, rid)
  local set = P .. 'run:' .. tenant
  redis.call('SREM', set, rid)
  if redis.call('EXISTS', set) == 0 then redis.call('SREM', P .. 'tenants', tenant) end
end

-- A request that joined another (join.lua) goes on by itself: the scheduler takes it up. What its journal has was made
-- by the other's model.
local function set_free(rid, record, maker)
  local fingerprint = redis.call('HGET', P .. 'r:' .. maker, 'fingerprint')
  if fingerprint then redis.call('HSET', record, 'fingerprint', fingerprint) end
  redis.call('HDEL', record, 'joins')
  redis.call('XADD', P .. 'events', '*', 'k', 'j', 'r', rid)
end

-- A request whose answer others wait for has ended. Those that got all of it ended with it; else the first of the others
-- goes on from its own journal, and the rest wait for that one.
local function hand_flight_over(rid, flight, followers)
  local heir, rest = nil, {}
  for one in string.gmatch(followers or '', '%S+') do
    local v = redis.call('HMGET', P .. 'r:' .. one, 'open', 'joins')
    if v[1] and v[1] ~= '0' and v[2] == rid then
      if heir then
        redis.call('HSET', P .. 'r:' .. one, 'joins', heir)
        rest[#rest + 1] = one
      else
        heir = one
      end
    end
  end
  if heir then
    redis.call('HSET', P .. 'r:' .. heir, 'flight', flight, 'followers', table.concat(rest, ' '), 'reaches', 1)
    redis.call('HSET', P .. 'flights', flight, heir)
    set_free(heir, P .. 'r:' .. heir, rid)
  elseif redis.call('HGET', P .. 'flights', flight) == rid then
    redis.call('HDEL', P .. 'flights', flight)
  end
end

-- A request has ended: what is kept of it, but for its journals, expires from now on.
local function close_request(rid, record)
  local v = redis.call('HMGET', record, 'n', 'idem', 'tenant', 'charged', 'seed', 'flight', 'followers')
  redis.call('HDEL', P .. 'live', rid)
  redis.call('HSET', record, 'ended', milliseconds())
  redis.call('PEXPIRE', record, retention)
  if v[3] then end_running(v[3], rid) end
  if v[4] and v[4] ~= '' then -- it holds a reservation
    if not v[5] then owe(v[3], -tonumber(v[4])) end -- its prompt was never computed
    redis.call('HSET', P .. 'owed', 'end:' .. rid, v[3])
  end
  if v[2] and v[2] ~= '' then redis.pcall('PEXPIRE', P .. v[2], retention) end
  if v[6] then hand_flight_over(rid, v[6], v[7]) end
  return tonumber(v[1])
end

-- The last choice ended.
local function end_request(rid, record)
  local choices = close_request(rid, record)
  for i = 0, choices - 1 do redis.call('PEXPIRE', P .. 'j:' .. rid .. ':' .. i, retention) end
end

local function write_result(name, result)
  local key = P .. 'results:' .. name
  redis.pcall('XADD', key, 'MAXLEN', '~', '10000', '*', 'result', result)
  redis.pcall('PEXPIRE', key, 86400000)
end

local function end_choice(rid, record, choice, finish, result)
  redis.call('HSET', record, 'e' .. choice, finish)
  local open = redis.call('HINCRBY', record, 'open', -1)
  local name = redis.call('HGET', record, 'results')
  if result ~= '' and name and name ~= '' then write_result(name, result) end
  if open <= 0 then end_request(rid, record) end
end

-- A key of the row has the wrong type (somebody else wrote there): the choice can never go on, so it is closed, with
-- an error result and a dead letter. A record of a wrong type is no request: it leaves `live`.
local function close_broken(rid, choice, placement)
  local record = P .. 'r:' .. rid
  local v = redis.pcall('HMGET', record, 'open', 'p' .. choice, 'e' .. choice, 'id')
  if v.err then return redis.call('HDEL', P .. 'live', rid) end
  if not v[1] or v[3] or (v[2] or '0') ~= placement then return end
  local result = cmsgpack.pack({
    v = 1, rid = rid, id = v[4] or '', choice = tonumber(choice), finish_reason = 'error',
    error = { code = 'store_failed', message = 'the journal of this request was overwritten' },
  })
  redis.pcall('XADD', P .. 'dead', 'MAXLEN', '~', '1000', '*', 'rid', rid, 'code', 'store_failed')
  end_choice(rid, record, choice, 'error', result)
end

-- The row of argument i, which has just landed, lands for `rid` too, which waits for the same answer: the two journals
-- are the same bytes. Whatever has a placement of its own is fed no more. The last row of one that is to have a result is
-- its own affair, since only who computes it can write the result: it is set free when the other one has ended.
local function feed_one(i, rid)
  local choice, cursor, finish, frames = ARGV[i + 1], tonumber(ARGV[i + 3]), ARGV[i + 4], ARGV[i + 7]
  local record, journal = P .. 'r:' .. rid, P .. 'j:' .. rid .. ':' .. choice
  local v = redis.call('HMGET', record, 'open', 'p' .. choice, 'e' .. choice, 'joins', 'id', 'results')
  if not v[1] or v[3] or v[4] ~= ARGV[i] then return end
  if finish ~= '' and v[6] and v[6] ~= '' then return end
  if v[2] or redis.call('STRLEN', journal) ~= cursor then return set_free(rid, record, ARGV[i]) end
  redis.call('APPEND', journal, frames)
  local head = '\149' .. cmsgpack.pack(rid) .. string.sub(ARGV[i + 6], 2 + #cmsgpack.pack(ARGV[i]))
  local tail = (v[5] and v[5] ~= '') and cmsgpack.pack(v[5]) or '\192'
  for name in string.gmatch(redis.call('HGET', P .. 'live', rid) or '', '%S+') do
    redis.pcall(PUBLISH, P .. 'out:' .. name, head .. frames .. tail)
  end
  if finish ~= '' then end_choice(rid, record, choice, finish, '') end
end

-- An end that is not the model's own (abort, deadline, error) is the request's alone.
local function feed(i, followers)
  local finish = ARGV[i + 4]
  if finish ~= '' and finish ~= 'stop' and finish ~= 'length' then return end
  for rid in string.gmatch(followers, '%S+') do pcall(feed_one, i, rid) end
end

-- A row of a request that others wait for, or that holds a reservation. -> the tenant that owes for it ('': none)
local function reach_others(i, record)
  local v = redis.call('HMGET', record, 'tenant', 'followers', 'charged')
  if v[2] and v[2] ~= '' then feed(i, v[2]) end
  return (v[3] and v[3] ~= '') and v[1] or ''
end

-- One row: its verdict (l landed, c closed, s stale), and where it landed just now, the tenant that owes for it ('': none).
local function land(i)
  local rid, choice, placement, cursor = ARGV[i], ARGV[i + 1], ARGV[i + 2], tonumber(ARGV[i + 3])
  local finish, frames = ARGV[i + 4], ARGV[i + 7]
  local record, journal = P .. 'r:' .. rid, P .. 'j:' .. rid .. ':' .. choice
  local v = redis.call('HMGET', record, 'p' .. choice, 'e' .. choice, 'reaches')
  if not v[1] and redis.call('HEXISTS', record, 'open') == 0 then return 'c' end
  local ours = (v[1] or '0') == placement
  if v[2] then return (ours and holds(journal, cursor, frames)) and 'l' or 'c' end
  if not ours then return 's' end
  if redis.call('STRLEN', journal) ~= cursor then return holds(journal, cursor, frames) and 'l' or 's' end
  redis.call('APPEND', journal, frames)
  local tenant = v[3] and reach_others(i, record) or ''
  if finish ~= '' then end_choice(rid, record, choice, finish, ARGV[i + 5]) end
  return 'l', tenant
end

-- All rows from argument `first` on; `keep` is the retention.
-- -> one string of verdicts, the number of rows that landed just now, and of those of tenants with limits, by tenant
local function land_rows(first, keep)
  retention = keep
  local rids, verdicts, landed, tenants = {}, {}, 0, {}
  local parts, order = {}, {} -- reply channel -> what goes there; the channels as they came
  local to = {} -- value in `live` -> the lists in `parts` of its channels: most rows share one
  for i = first, #ARGV, 9 do rids[#rids + 1] = ARGV[i] end
  if #rids == 0 then return '', 0, tenants end
  local channels = redis.call('HMGET', P .. 'live', unpack(rids))
  for k = 1, #rids do
    local i = first + 9 * (k - 1)
    local ok, verdict, tenant = pcall(land, i)
    if not ok then pcall(close_broken, ARGV[i], ARGV[i + 1], ARGV[i + 2]) end
    verdicts[k] = ok and verdict or 'c'
    if ok and tenant then
      landed = landed + 1
      if tenant ~= '' then tenants[tenant] = (tenants[tenant] or 0) + 1 end
      local names = channels[k] or ''
      local lists = to[names]
      if not lists then
        lists = {}
        to[names] = lists
        for name in string.gmatch(names, '%S+') do
          if not parts[name] then parts[name] = {}; order[#order + 1] = name end
          lists[#lists + 1] = parts[name]
        end
      end
      for _, list in ipairs(lists) do
        local n = #list
        list[n + 1] = ARGV[i + 6]; list[n + 2] = ARGV[i + 7]; list[n + 3] = ARGV[i + 8]
      end
    end
  end
  for _, name in ipairs(order) do redis.pcall(PUBLISH, P .. 'out:' .. name, table.concat(parts[name])) end
  return table.concat(verdicts), landed, tenants
end
