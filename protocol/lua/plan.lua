-- Send one plan to a worker and record where its new sequences are. Counts as the leader's beat.
-- A placement is recorded only if the journal is as long as the plan says: from then on no row of an earlier placement
-- lands, so what the new one computes follows what the journal holds. Else the new rows will be stale, and the leader
-- reads the journal again.
-- A request that has begun goes on only at the fingerprint that it has begun with; '' (an older worker's) is any.
-- KEYS: leader. ARGV: P, epoch, wid, gen, step, plan, the worker's fingerprint,
-- then per new sequence: rid, choice, placement, cursor
-- -> 1, or 0 for a step that was sent before (a repeat)
allow_when_full()
local epoch, wid, gen, step = ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])
local worker = P .. 'w:' .. wid
if not is_leader(epoch) then return fenced('epoch') end
local v = redis.call('HMGET', worker, 'gen', 'planned_epoch', 'planned_step')
if v[1] ~= gen then return fenced('gen') end
redis.call('HINCRBY', P .. 'leader', 'beat', 1)
if v[2] == epoch and step <= tonumber(v[3]) then return 0 end
redis.call('HSET', worker, 'planned_epoch', epoch, 'planned_step', step)

local fingerprint = ARGV[7]

-- Whether any choice has a token in its journal.
local function has_begun(rid, n)
  for i = 0, n - 1 do
    if redis.call('EXISTS', P .. 'j:' .. rid .. ':' .. i) == 1 then return true end
  end
  return false
end

local function place(rid, choice, placement, cursor)
  local record = P .. 'r:' .. rid
  if redis.call('EXISTS', record) == 0 then return end
  if redis.call('STRLEN', P .. 'j:' .. rid .. ':' .. choice) ~= tonumber(cursor) then return end
  local v = redis.call('HMGET', record, 'fingerprint', 'n')
  local known = v[1] or ''
  if known ~= fingerprint then
    local begun = has_begun(rid, tonumber(v[2]))
    if begun and known ~= '' and fingerprint ~= '' then return end
    if fingerprint ~= '' or not begun then redis.call('HSET', record, 'fingerprint', fingerprint) end
  end
  redis.call('HSET', record, 'p' .. choice, placement)
end

for i = 8, #ARGV, 4 do pcall(place, ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]) end
redis.call('XADD', P .. 'plans:' .. wid, 'MAXLEN', '~', '4096', '*', 'p', ARGV[6])
return 1
