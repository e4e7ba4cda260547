-- Fence a worker's session for ever and drop its plans. Requests that were present at its death count it once.
-- KEYS: leader. ARGV: P, epoch, wid, gen, rids... -> 1 if this call fenced it
allow_when_full()
local epoch, wid, gen = ARGV[2], ARGV[3], ARGV[4]
local plans = P .. 'plans:' .. wid
if not is_leader(epoch) then return fenced('epoch') end
local fenced = is_worker(wid, gen)
if fenced then
  redis.call('HINCRBY', P .. 'leader', 'gen', 1)
  redis.call('DEL', P .. 'w:' .. wid)
  redis.call('SREM', P .. 'workers', wid)
  redis.call('XTRIM', plans, 'MAXLEN', 0)
  redis.call('PEXPIRE', plans, 3600000)
end
for i = 5, #ARGV do
  local record = P .. 'r:' .. ARGV[i]
  local v = redis.call('HMGET', record, 'open', 'died')
  if v[1] and v[1] ~= '0' and v[2] ~= gen then
    redis.call('HINCRBY', record, 'attempts', 1)
    redis.call('HSET', record, 'died', gen)
  end
end
return fenced and 1 or 0
