-- Forget events that the leader has read. An inbox whose last id is the last that there is takes no entry any more (a
-- producer may choose an id): empty, it is made anew. KEYS: leader. ARGV: P, epoch, first id to keep
allow_when_full()
if not is_leader(ARGV[2]) then return fenced('epoch') end
local function last_id(stream)
  local info = redis.call('XINFO', 'STREAM', stream)
  for i = 1, #info, 2 do
    if info[i] == 'last-generated-id' then return info[i + 1] end
  end
end

local jobs = P .. 'jobs'
if redis.call('XLEN', jobs) == 0 and string.find(last_id(jobs), '^18446744073709551615%-') then
  redis.call('DEL', jobs)
  redis.call('XGROUP', 'CREATE', jobs, 'scheduler', '0', 'MKSTREAM')
end
return redis.call('XTRIM', P .. 'events', 'MINID', ARGV[3])
