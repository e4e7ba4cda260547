-- Take the lead by compare-and-set on what the standby saw. No clock and no expiry is involved.
-- `level` says which jobs the leader can read, as "epoch:level": an older leader that follows leaves it as it is.
-- KEYS: leader. ARGV: P, epoch seen, beat seen, owner, wire, level -> the new epoch, or 0
allow_when_full()
local leader, owner = P .. 'leader', ARGV[4]
local made = redis.pcall('XGROUP', 'CREATE', P .. 'jobs', 'scheduler', '0', 'MKSTREAM')
if made.err and not string.find(made.err, 'BUSYGROUP', 1, true) then return made end
local v = redis.call('HMGET', leader, 'epoch', 'beat', 'owner')
local epoch = tonumber(v[1] or 0)
if v[3] == owner and epoch == tonumber(ARGV[2]) + 1 then return epoch end -- repeated after a lost reply
if epoch ~= tonumber(ARGV[2]) or (v[2] or '0') ~= ARGV[3] then return 0 end
redis.call('HSET', leader, 'epoch', epoch + 1, 'beat', 0, 'owner', owner, 'wire', ARGV[5],
  'level', (epoch + 1) .. ':' .. ARGV[6])
return epoch + 1
